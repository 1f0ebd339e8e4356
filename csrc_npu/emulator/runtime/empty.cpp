// The source of libraries that contain nothing and link to the library that has their functions.
