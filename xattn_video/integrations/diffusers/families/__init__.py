"""Model families whose attention processor is replaced instead of wrapped."""
