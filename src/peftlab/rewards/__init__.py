"""What an answer is worth: classifier rewards and any Python function, weighted and normalised."""
