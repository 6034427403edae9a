"""Files that others wrote, in a folder or on the Hub: found, fetched, and checked before they are used."""
