"""The physics: what a layout costs in seconds and bytes, before anything runs. No torch, no matplotlib here."""
