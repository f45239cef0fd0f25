//! What a disk may hold.
//!
//! The judge of every run: plain bytes, and a list of what was done to them since the last flush. It shares no code with
//! the engine.

use std::ops::Range;

use super::content::{Content, origin_of};
use super::failure::Failure;

/// Sectors are compared at once.
const BLOCK: usize = 512;

/// How sure an effect is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It succeeded; a crash may lose it.
    Done,
    /// It failed, or was under way: each byte may be old or new.
    Open,
    /// It succeeded and a later flush did, too.
    Durable,
}

/// A change of content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    /// Which bytes.
    pub range: Range<u64>,
    /// What they became.
    pub content: Content,
    /// How sure that is.
    pub state: State,
}

/// From where a disk is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// By the one who did all this: what succeeded is there.
    Running,
    /// After a crash: only what is durable has to be there.
    Crashed,
}

/// What a disk may hold.
#[derive(Clone, Debug)]
pub struct Ledger {
    base: Vec<u8>,
    effects: Vec<Effect>,
    sizes: Vec<u64>,
    /// Larger than the size in use: of resizes that failed, and may have taken place on disk nevertheless. That harms
    /// nobody, so nothing but the next resize puts it right.
    open_sizes: Vec<u64>,
}

impl Ledger {
    /// A disk that durably holds these bytes.
    pub fn new(disk: Vec<u8>) -> Self {
        Self {
            sizes: vec![disk.len() as u64],
            base: disk,
            effects: Vec::new(),
            open_sizes: Vec::new(),
        }
    }

    /// The size of the disk as it is for the one who uses it; bytes.
    pub fn size(&self) -> u64 {
        *self.sizes.last().expect("there is always one")
    }

    /// Sizes that the disk may have after a crash.
    pub fn sizes(&self) -> Vec<u64> {
        [&self.open_sizes[..], &self.sizes].concat()
    }

    /// Notes a change.
    pub fn add(&mut self, range: Range<u64>, content: Content, state: State) {
        if range.start >= range.end {
            return;
        }
        self.effects.push(Effect {
            range,
            content,
            state,
        });
    }

    /// Notes another size. What is cut off reads as zeros should it come back.
    pub fn resize(&mut self, size: u64, state: State) {
        let old = self.size();
        if size < old {
            self.add(size..old, Content::Zeros, state);
        }
        match state {
            // The old one stays the one in use.
            State::Open if size > old => self.open_sizes.push(size),
            State::Open => self.sizes.insert(0, size),
            State::Done | State::Durable => {
                let open = std::mem::take(&mut self.open_sizes);
                self.sizes.splice(0..0, open);
                self.sizes.push(size);
            }
        }
    }

    /// Says which of the sizes the disk turned out to have.
    pub fn settle_size(&mut self, size: u64) {
        self.sizes = vec![size];
        self.open_sizes.clear();
    }

    /// Notes that a flush succeeded.
    pub fn flushed(&mut self) {
        let size = self.size();
        self.sizes = vec![size];
        for effect in &mut self.effects {
            if effect.state == State::Done {
                effect.state = State::Durable;
            }
        }
        self.fold();
    }

    /// Notes that whoever did what was not flushed is gone: all of it may have happened or not.
    pub fn forget_unflushed(&mut self) {
        for effect in &mut self.effects {
            if effect.state == State::Done {
                effect.state = State::Open;
            }
        }
    }

    /// Takes the effects that nothing makes doubtful into the bytes.
    fn fold(&mut self) {
        let sure = self
            .effects
            .iter()
            .take_while(|effect| effect.state == State::Durable)
            .count();
        for effect in self.effects.drain(..sure) {
            put(&mut self.base, &effect);
        }
    }

    /// Forgets everything but these bytes, as read after a crash.
    pub fn restart(&mut self, disk: Vec<u8>) {
        *self = Self::new(disk);
    }

    /// What the disk holds if every change took place: `size` bytes.
    pub fn content(&self) -> Vec<u8> {
        let mut bytes = self.base.clone();
        for effect in &self.effects {
            put(&mut bytes, effect);
        }
        bytes.resize(self.size() as usize, 0);
        bytes
    }

    /// The part of [`content`](Self::content) in a range; what lies past the end is zero.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let from = (range.start as usize).min(self.base.len());
        let to = (range.end as usize).min(self.base.len());
        bytes[..to - from].copy_from_slice(&self.base[from..to]);
        for effect in &self.effects {
            let start = effect.range.start.max(range.start);
            let end = effect.range.end.min(range.end);
            if start < end {
                let place = (start - range.start) as usize..(end - range.start) as usize;
                effect.content.fill(start, &mut bytes[place]);
            }
        }
        bytes
    }

    /// Whether the disk may hold `bytes` at `offset`.
    ///
    /// # Errors
    ///
    /// The first byte that it may not hold, and where that seems to come from.
    pub fn admit(&self, offset: u64, bytes: &[u8], view: View) -> Result<(), Failure> {
        let expected = self.read(offset..offset + bytes.len() as u64);
        if expected == bytes {
            return Ok(());
        }
        for (index, (found, block)) in bytes.chunks(BLOCK).zip(expected.chunks(BLOCK)).enumerate() {
            if found == block {
                continue;
            }
            for (at, byte) in found.iter().enumerate() {
                let place = offset + (index * BLOCK + at) as u64;
                if !self.admits_byte(place, *byte, view) {
                    return Err(self.mismatch(offset, bytes, index * BLOCK + at));
                }
            }
        }
        Ok(())
    }

    fn admits_byte(&self, offset: u64, byte: u8, view: View) -> bool {
        for effect in self.effects.iter().rev() {
            if !effect.range.contains(&offset) {
                continue;
            }
            if effect.content.byte(offset) == byte {
                return true;
            }
            let sure = match (effect.state, view) {
                (State::Durable, _) | (State::Done, View::Running) => true,
                (State::Open, _) | (State::Done, View::Crashed) => false,
            };
            if sure {
                return false;
            }
        }
        self.base.get(offset as usize).copied().unwrap_or(0) == byte
    }

    fn mismatch(&self, offset: u64, bytes: &[u8], at: usize) -> Failure {
        let place = offset + at as u64;
        let expected = self.read(place..place + 1)[0];
        // The first whole word after it tells the origin.
        let word =
            (at..bytes.len().saturating_sub(7)).find(|at| (offset + *at as u64).is_multiple_of(8));
        let origin = word
            .and_then(|at| origin_of(bytes[at..at + 8].try_into().expect("eight bytes")))
            .map_or_else(String::new, |(tag, from)| {
                format!(", written by tag {tag} at {from:#x}")
            });
        let history: Vec<String> = self
            .effects
            .iter()
            .filter(|effect| effect.range.contains(&place))
            .map(|effect| format!("{:?} {:?}", effect.content, effect.state))
            .collect();
        Failure::new(format!(
            "byte {place:#x} is {:#04x}{origin}, not {expected:#04x} (durable {:#04x}, since then {history:?})",
            bytes[at],
            self.base.get(place as usize).copied().unwrap_or(0),
        ))
    }
}

fn put(bytes: &mut Vec<u8>, effect: &Effect) {
    let end = effect.range.end as usize;
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    let start = effect.range.start;
    effect.content.fill(start, &mut bytes[start as usize..end]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_flushed_must_be_there_and_what_was_not_may_be() {
        let mut ledger = Ledger::new(vec![1; 4096]);
        ledger.add(0..2048, Content::Byte(2), State::Done);
        ledger.flushed();
        ledger.add(1024..3072, Content::Byte(3), State::Done);
        let mut bytes = vec![2; 2048];
        bytes.extend([1; 2048]);
        ledger.admit(0, &bytes, View::Crashed).unwrap();
        ledger.admit(0, &bytes, View::Running).unwrap_err();
        bytes[1100..2500].fill(3);
        ledger.admit(0, &bytes, View::Crashed).unwrap();
        bytes[1000] = 1;
        ledger.admit(0, &bytes, View::Crashed).unwrap_err();
        ledger.admit(0, &ledger.content(), View::Running).unwrap();
    }

    #[test]
    fn a_failed_write_is_old_or_new_until_it_is_overwritten() {
        let mut ledger = Ledger::new(vec![1; 1024]);
        ledger.add(0..1024, Content::Byte(2), State::Open);
        ledger.admit(0, &[1, 2, 1], View::Running).unwrap();
        ledger.flushed();
        ledger.admit(0, &[1, 2, 1], View::Crashed).unwrap();
        ledger.add(0..10, Content::Byte(5), State::Done);
        ledger.admit(0, &[1, 2, 1], View::Running).unwrap_err();
        ledger.admit(0, &[5, 5], View::Running).unwrap();
        ledger.flushed();
        ledger.admit(0, &[1], View::Crashed).unwrap_err();
    }

    #[test]
    fn a_disk_that_was_cut_comes_back_with_zeros() {
        let mut ledger = Ledger::new(vec![1; 1024]);
        ledger.resize(512, State::Done);
        ledger.resize(2048, State::Done);
        assert_eq!(ledger.sizes(), [1024, 512, 2048]);
        assert_eq!(
            ledger.content()[..513],
            [[1; 512].as_slice(), &[0]].concat()
        );
        ledger.flushed();
        assert_eq!((ledger.sizes(), ledger.content().len()), (vec![2048], 2048));
    }

    #[test]
    fn stale_bytes_are_told_by_their_origin() {
        let ledger = Ledger::new(vec![0; 4096]);
        let stale = Content::Tagged(7).bytes(512, 512);
        let failure = ledger.admit(1024, &stale, View::Running).unwrap_err();
        assert!(failure.to_string().contains("tag 7 at 0x200"), "{failure}");
    }
}
