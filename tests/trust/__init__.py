"""What others wrote is data, and what this package writes is whole."""
