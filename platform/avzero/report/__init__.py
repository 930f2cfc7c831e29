"""Reports: records in the store become tables and progress displays."""
