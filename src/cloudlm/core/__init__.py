"""What the words mean: chat, model, deployment, job, key; errors, settings, clock. No I/O."""
