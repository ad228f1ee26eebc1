"""What an adapter is: its files, and what is checked before anybody can see it."""
