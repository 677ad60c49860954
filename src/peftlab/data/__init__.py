"""Files become records, records become token batches."""
