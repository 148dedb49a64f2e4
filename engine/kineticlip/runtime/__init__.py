"""What every room stands on: errors, files written whole, journals, processes, this machine."""
