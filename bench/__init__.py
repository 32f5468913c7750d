"""What it costs: the load generators and one script for each figure."""
