"""What an unlearned model does that its base did not."""
