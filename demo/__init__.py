"""The whole system on the bundled clips (`make demo`), its report, and a table of small models."""
