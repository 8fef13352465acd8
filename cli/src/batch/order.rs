//! In which order answers are written.

use std::collections::VecDeque;

/// Lines on their way: each enters when it is asked for, and leaves when its answer is written.
pub struct Order {
    /// Answers wait for those before them.
    by_input: bool,
    /// Of lines from `first` on: the answer, if it is there. Without an order: of none.
    waiting: VecDeque<Option<Answer>>,
    first: u64,
    /// Lines that entered.
    entered: u64,
    /// Lines that left.
    left: u64,
    /// Bytes of the answers that wait for those before them.
    bytes: usize,
    ready: Ready,
}

/// A line of the output, and whether it says why there is no answer.
type Answer = (Vec<u8>, bool);

/// Answers that can be written.
#[derive(Debug, Default)]
pub struct Ready {
    pub lines: Vec<u8>,
    pub count: u64,
    /// Of those, the ones that say why there is no answer.
    pub errors: u64,
}

impl Ready {
    fn add(&mut self, (line, is_error): &Answer) {
        self.lines.extend_from_slice(line);
        self.count += 1;
        self.errors += u64::from(*is_error);
    }
}

impl Order {
    pub fn new(by_input: bool) -> Self {
        Self { by_input, waiting: VecDeque::new(), first: 0, entered: 0, left: 0, bytes: 0, ready: Ready::default() }
    }

    /// The place of the next line.
    pub fn enter(&mut self) -> u64 {
        if self.by_input {
            self.waiting.push_back(None);
        }
        self.entered += 1;
        self.entered - 1
    }

    /// The answer to the line that has this place.
    pub fn put(&mut self, place: u64, line: Vec<u8>, is_error: bool) {
        let answer = (line, is_error);
        if !self.by_input {
            self.ready.add(&answer);
            self.left += 1;
            return;
        }
        self.bytes += answer.0.len();
        self.waiting[(place - self.first) as usize] = Some(answer);
        while let Some(Some(answer)) = self.waiting.front() {
            self.ready.add(answer);
            self.bytes -= answer.0.len();
            self.waiting.pop_front();
            self.first += 1;
            self.left += 1;
        }
    }

    /// Lines that have entered, and whose answers cannot be written yet.
    pub fn held(&self) -> usize {
        (self.entered - self.left) as usize
    }

    /// Bytes of the answers among them.
    pub fn held_bytes(&self) -> usize {
        self.bytes
    }

    /// Answers that can be written now.
    pub fn take_ready(&mut self) -> Ready {
        std::mem::take(&mut self.ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_out_in_the_order_of_their_lines_however_they_end() {
        let mut rng = fastrand::Rng::new();
        for by_input in [true, false] {
            let mut order = Order::new(by_input);
            let (mut open, mut out, mut put) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..200 {
                if rng.bool() || open.is_empty() {
                    open.push(order.enter());
                } else {
                    let place = open.swap_remove(rng.usize(..open.len()));
                    order.put(place, vec![place as u8], place % 3 == 0);
                    put.push(place as u8);
                }
                let ready = order.take_ready();
                let errors = ready.lines.iter().filter(|place| **place % 3 == 0).count();
                assert_eq!((ready.lines.len() as u64, errors as u64), (ready.count, ready.errors));
                out.extend(ready.lines);
                assert_eq!(order.held(), order.entered as usize - out.len());
                let put_not_out = if by_input { put.len() - out.len() } else { 0 };
                assert_eq!(order.held_bytes(), put_not_out);
            }
            for place in open {
                order.put(place, vec![place as u8], place % 3 == 0);
                put.push(place as u8);
            }
            out.extend(order.take_ready().lines);
            let sorted: Vec<u8> = (0..order.entered as u8).collect();
            assert_eq!(out, if by_input { sorted } else { put });
            assert_eq!(order.held(), 0);
        }
    }
}
