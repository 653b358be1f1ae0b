"""One module a backend, each with why_not(problem), forward(inputs) and backward(inputs, out, lse, grad_out, …)."""
