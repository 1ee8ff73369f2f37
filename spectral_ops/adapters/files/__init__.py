"""What a file holds of an adapter; io.py beside this folder saves and loads."""
