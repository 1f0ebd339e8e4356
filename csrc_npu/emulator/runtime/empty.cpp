// For libraries that only hand on libascendcl.so.
