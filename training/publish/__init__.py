"""What hub_upload.py needs beside the run's own card: sections on the data, and a look at the folder from outside."""
