//! Ranges and sets of pages. Pure values.
