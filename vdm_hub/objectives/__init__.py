"""What training minimises: the variational bound in its named terms, its forms, and the restrictions between rungs."""
