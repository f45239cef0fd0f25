//! Which time counts.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// What a rate is a rate of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// Time as it goes by.
    Wall,
    /// What the threads spent on processors, in the kernel, too: as long as it would take if each had a processor of its own
    /// and waited for nothing.
    Cpu,
}

/// Runs from its start, for the thread that started it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stopwatch {
    wall: Instant,
    cpu: Duration,
}

/// What one thread took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lap {
    pub(super) start: Instant,
    pub(super) end: Instant,
    pub(super) cpu: Duration,
}

impl Stopwatch {
    pub(super) fn start() -> Self {
        let cpu = thread_time();
        Self {
            wall: Instant::now(),
            cpu,
        }
    }

    pub(super) fn lap(&self) -> Lap {
        let end = Instant::now();
        Lap {
            start: self.wall,
            end,
            cpu: thread_time().saturating_sub(self.cpu),
        }
    }

    /// Requests per second, if so many were made since the start.
    pub(super) fn rate(&self, clock: Clock, requests: u32) -> f64 {
        rate(clock, requests, &[self.lap()])
    }
}

/// Requests per second of all threads together, if each made so many.
pub(super) fn rate(clock: Clock, requests: u32, laps: &[Lap]) -> f64 {
    let count = laps.len().max(1);
    let took = match clock {
        Clock::Wall => {
            let start = laps.iter().map(|lap| lap.start).min();
            let end = laps.iter().map(|lap| lap.end).max();
            end.zip(start)
                .map_or(0.0, |(end, start)| (end - start).as_secs_f64())
        }
        Clock::Cpu => laps
            .iter()
            .map(|lap| lap.cpu.as_secs_f64() / float(count))
            .sum(),
    };
    f64::from(requests) * float(count) / took
}

#[expect(clippy::cast_precision_loss, reason = "a number of threads")]
fn float(count: usize) -> f64 {
    count as f64
}

fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laps_overlap_in_time_and_add_up_in_work() {
        let now = Instant::now();
        let lap = |start, end, cpu| Lap {
            start: now + Duration::from_secs(start),
            end: now + Duration::from_secs(end),
            cpu: Duration::from_secs(cpu),
        };
        let laps = [lap(0, 3, 1), lap(1, 4, 3)];
        assert!((rate(Clock::Wall, 10, &laps) - 5.0).abs() < 1e-9);
        assert!((rate(Clock::Cpu, 10, &laps) - 10.0).abs() < 1e-9);
    }
}
