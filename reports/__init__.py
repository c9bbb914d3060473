"""The pictures: predictions and measurements side by side. The only package that imports matplotlib."""
