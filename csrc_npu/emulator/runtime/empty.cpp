// The source of libraries that contain nothing and link to another of the emulator's libraries.
