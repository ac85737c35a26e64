"""The whole system on the bundled clips (`make demo`), its report, and the small models' table (`make table`)."""
