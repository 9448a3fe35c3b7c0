"""Reading and writing concepts and merged LoRAs."""
