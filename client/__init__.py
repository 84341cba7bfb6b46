"""What runs at a bank: its data, its ledger and policy, private training."""
