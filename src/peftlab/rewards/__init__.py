"""What an answer is worth: classifiers, reward models, a rubric and any Python function, weighted and normalised."""
