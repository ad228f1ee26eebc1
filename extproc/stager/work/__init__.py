"""What takes time: staging, refreshing, evicting, reading back; one module per verb."""
