"""The command line: one file per noun. Text in, text out; no decisions of its own."""
