"""What can be known before a device is touched."""
