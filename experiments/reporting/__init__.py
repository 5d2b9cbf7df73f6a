"""Reports, pictures, and the machine that figures are from."""
