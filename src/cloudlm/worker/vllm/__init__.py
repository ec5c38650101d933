"""vLLM as the engine of a replica: its server as a child process, and a front before it."""
