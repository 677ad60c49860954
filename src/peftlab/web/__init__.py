"""The lab's one web app, on this machine only: what guards it, and the pages and APIs that it serves."""
