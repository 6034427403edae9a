"""What training minimises: the variational bound in its named terms, its forms, and a VDM as a hierarchical VAE."""
