// The source of libraries that contain nothing and link to libascendcl.so.
