"""What every room uses: batches, options of an enumeration, processes, progress, versions."""
