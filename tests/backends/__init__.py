"""The seam to what multiplies: routing, the defaults made of five methods, memory."""
