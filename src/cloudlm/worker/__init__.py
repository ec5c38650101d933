"""What runs inside a started replica: one OpenAI-compatible server around one engine."""
