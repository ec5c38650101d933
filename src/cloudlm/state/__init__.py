"""What is asked and what runs: deployments, endpoints, demand, keys, jobs, ledger."""
