"""What the supervised recipes share around the Trainer of transformers."""
