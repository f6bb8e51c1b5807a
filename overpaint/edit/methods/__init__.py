"""Editing methods: one method a file, with its paper and its deviations from it."""
