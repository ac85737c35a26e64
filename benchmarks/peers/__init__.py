"""Other methods' networks as programs that read a folder and write a folder, for `jobs.peer`."""
