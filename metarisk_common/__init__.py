"""The vocabulary and mathematics that servers, banks and simulations share."""
