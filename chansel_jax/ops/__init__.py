"""Channel selection and the dense convolution as functions of arrays, and how each is lowered."""
