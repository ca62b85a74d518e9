"""One training loop; a method is an objective plus which parameters train."""
