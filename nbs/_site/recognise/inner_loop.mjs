// The inner loop in its dual form, as `head_path` of the page on the base learner has it.
// Gradient descent on a linear softmax head never leaves the span of the support features F:
// the adapted head is that of the start minus A F, so the loop runs on A [classes][pictures] alone.
// All classes start from the same row, which softmax does not see: it is left out.

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

// The products of features, [rows][columns]; the 1 is the bias.
const kernel = (rows, columns) => rows.map(a => columns.map(b => dot(a, b) + 1));

const softmax = logits => {
  const top = Math.max(...logits), powers = logits.map(z => Math.exp(z - top));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(p => p / sum);
};

const probabilities = (kernel, A) => kernel.map(row => softmax(A.map(a => -dot(row, a))));

// support: [pictures][D] features; labels: the class of each, from 0 to classes - 1, none of them left out.
// A class weighs the same in the loss, however many pictures it has.
export function adapt(support, labels, classes, lr, steps) {
  const gram = kernel(support, support);
  const rates = labels.map(label => lr / (classes * labels.filter(other => other === label).length));
  const A = Array.from({ length: classes }, () => new Float64Array(support.length));
  for (let step = 0; step < steps; step++) {
    const P = probabilities(gram, A);
    A.forEach((a, c) => a.forEach((_, i) => a[i] += rates[i] * (P[i][c] - (labels[i] === c))));
  }
  return A;
}

// query: [m][D] features -> [m][classes] probabilities
export const predict = (A, support, query) => probabilities(kernel(query, support), A);
