"""Editing methods: one file for each method, with its paper and the deviations from it."""
