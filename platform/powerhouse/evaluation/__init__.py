"""Every number with its n and its signature."""
