"""What a plan costs and commits; which one is next."""
