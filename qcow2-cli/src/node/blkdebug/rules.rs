//! What a fault injector does, and when.

use std::collections::BTreeMap;

use rustix::io::Errno;

use crate::node::{NodeOptions, OpenError};

/// What kind of request a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl IoType {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Self::Read,
            "write" => Self::Write,
            "write-zeroes" => Self::WriteZeroes,
            "discard" => Self::Discard,
            "flush" => Self::Flush,
            "block-status" => Self::BlockStatus,
            _ => return None,
        })
    }
}

/// A rule: at an event, in a state, something happens.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    event: String,
    /// 0: in any.
    state: u64,
    action: Action,
}

#[derive(Clone, Debug)]
enum Action {
    /// A request fails.
    Fail {
        errno: Errno,
        sector: Option<u64>,
        kind: Option<IoType>,
        once: bool,
    },
    /// The state becomes another.
    Enter(u64),
}

/// Rules, and where they have led so far.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    list: Vec<Rule>,
    state: u64,
    /// What all writes fail with, since one has that is not to be the only one.
    stuck: Option<Errno>,
}

impl Rules {
    /// Rules of a description: `inject-error.0.event` and so on.
    pub(super) fn take_from(options: &mut NodeOptions) -> Result<Self, OpenError> {
        let mut rules = Vec::new();
        for list in ["inject-error", "set-state"] {
            let (mut entries, _) = options.take_child(list);
            let mut by_number: BTreeMap<String, NodeOptions> = BTreeMap::new();
            while let Some(key) = entries.first_key().map(str::to_owned) {
                let (number, inner) = key.split_once('.').unwrap_or(("0", &key));
                let value = entries.take(&key).unwrap_or_default();
                by_number
                    .entry(number.to_owned())
                    .or_default()
                    .set(inner, value);
            }
            for entry in by_number.into_values() {
                rules.push(Rule::from_options(list, entry)?);
            }
        }
        Ok(Self {
            list: rules,
            state: 1,
            stuck: None,
        })
    }

    /// Adds the rules of a configuration file.
    pub(super) fn add_config(&mut self, text: &str) -> Result<(), OpenError> {
        let mut section: Option<(String, NodeOptions)> = None;
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(name) = line
                .strip_prefix('[')
                .and_then(|line| line.strip_suffix(']'))
            {
                self.add_section(section.take())?;
                let name = name.split_whitespace().next().unwrap_or_default();
                section = Some((name.to_owned(), NodeOptions::default()));
                continue;
            }
            let parts = line.split_once('=').zip(section.as_mut());
            let Some(((key, value), (_, options))) = parts else {
                return Err(OpenError::new(format!(
                    "Could not parse blkdebug config file: '{line}'"
                )));
            };
            options.set(key.trim(), value.trim().trim_matches('"'));
        }
        self.add_section(section)
    }

    fn add_section(&mut self, section: Option<(String, NodeOptions)>) -> Result<(), OpenError> {
        if let Some((name, options)) = section {
            self.list.push(Rule::from_options(&name, options)?);
        }
        Ok(())
    }

    /// A step is about to be done, in memory; the error that it gets, if it gets one.
    pub(super) fn step(&mut self, event: &str) -> Option<Errno> {
        let stuck = self.stuck.take();
        let failed = self.happen(event, IoType::Write, 0, 0);
        self.stuck = self.stuck.or(stuck);
        failed
    }

    /// An event came, by a request of a kind at a place; the error that it gets, if it gets one.
    pub(super) fn happen(
        &mut self,
        event: &str,
        kind: IoType,
        offset: u64,
        len: u64,
    ) -> Option<Errno> {
        let state = self.state;
        let applies = |rule: &Rule| {
            (rule.event == event || rule.event == "none")
                && (rule.state == 0 || rule.state == state)
        };
        let found = self.list.iter().position(|rule| {
            applies(rule)
                && match &rule.action {
                    Action::Fail {
                        sector,
                        kind: wanted,
                        ..
                    } => {
                        wanted.is_none_or(|wanted| wanted == kind)
                            && (wanted.is_some() || kind != IoType::BlockStatus)
                            && sector.is_none_or(|sector| {
                                (offset..offset.saturating_add(len.max(1)))
                                    .contains(&(sector * 512))
                            })
                    }
                    Action::Enter(_) => false,
                }
        });
        let entered = self.list.iter().find_map(|rule| match rule.action {
            Action::Enter(state) if applies(rule) && rule.event == event => Some(state),
            _ => None,
        });
        if let Some(state) = entered {
            self.state = state;
        }
        let writes = matches!(kind, IoType::Write | IoType::WriteZeroes);
        // Refcounts are looked up by who is about to write.
        let begins = writes || event == "refblock_load";
        let Some(index) = found else {
            return self.stuck.filter(|_| writes);
        };
        let (errno, once) = match self.list.get(index)?.action {
            Action::Fail { errno, once, .. } => (errno, once),
            Action::Enter(_) => return None,
        };
        if once {
            self.list.remove(index);
        } else if self.sticks(index, event) && begins {
            self.stuck = Some(errno);
        }
        Some(errno)
    }

    /// What all writes fail with by now, if they do.
    pub(super) fn stuck(&self) -> Option<Errno> {
        self.stuck
    }

    /// Whether what fails by a rule goes on to fail with all that is written after it: where it is not to fail once, and nowhere in particular.
    /// Where places are only looked for, nothing is being written yet.
    fn sticks(&self, index: usize, event: &str) -> bool {
        let rule = self.list.get(index);
        !matches!(event, "none" | "cluster_alloc" | "l1_grow_alloc_table")
            && rule.is_some_and(|rule| {
                matches!(
                    rule.action,
                    Action::Fail {
                        sector: None,
                        kind: None,
                        once: false,
                        ..
                    }
                )
            })
    }
}

impl Rule {
    fn from_options(list: &str, mut options: NodeOptions) -> Result<Self, OpenError> {
        let event = options
            .take("event")
            .ok_or_else(|| OpenError::new(format!("Missing event name for rule '{list}'")))?;
        let number = |options: &mut NodeOptions, key: &str| -> Result<Option<u64>, OpenError> {
            let Some(text) = options.take(key) else {
                return Ok(None);
            };
            let parsed = text.parse();
            parsed
                .map(Some)
                .map_err(|_| OpenError::new(format!("Parameter '{key}' expects a number")))
        };
        let state = number(&mut options, "state")?.unwrap_or(0);
        let action = if list == "set-state" {
            Action::Enter(number(&mut options, "new_state")?.unwrap_or(0))
        } else {
            let errno = number(&mut options, "errno")?.unwrap_or(5);
            let errno = i32::try_from(errno).unwrap_or(5);
            let sector = match options.take("sector") {
                None => None,
                Some(text) if text.starts_with('-') => None,
                Some(text) => text.parse().ok(),
            };
            let kind = match options.take("iotype") {
                None => None,
                Some(name) => Some(IoType::from_name(&name).ok_or_else(|| {
                    OpenError::new(format!("Parameter 'iotype' does not accept value '{name}'"))
                })?),
            };
            options.take_switch("immediately")?;
            Action::Fail {
                errno: Errno::from_raw_os_error(errno),
                sector,
                kind,
                once: options.take_switch("once")?.unwrap_or(false),
            }
        };
        Ok(Self {
            event,
            state,
            action,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_a_file_fail_requests_in_their_state_and_place() {
        let mut rules = Rules::take_from(&mut NodeOptions::default()).unwrap();
        rules
            .add_config(
                "# a comment\n[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\nsector = \"2\"\nonce = \"on\"\nstate = \"2\"\n\
                 [set-state]\nevent = \"write_aio\"\nnew_state = \"2\"\n",
            )
            .unwrap();
        assert_eq!(rules.happen("read_aio", IoType::Read, 0, 4096), None);
        assert_eq!(rules.happen("write_aio", IoType::Write, 0, 512), None);
        assert_eq!(rules.happen("read_aio", IoType::Read, 0, 1024), None);
        assert_eq!(
            rules.happen("read_aio", IoType::Read, 0, 4096),
            Some(Errno::NOSPC)
        );
        assert_eq!(
            rules.happen("read_aio", IoType::Read, 0, 4096),
            None,
            "once"
        );
        rules
            .add_config("[inject-error]\nevent = \"l2_update\"\nerrno = \"28\"\n")
            .unwrap();
        assert_eq!(rules.happen("none", IoType::Write, 0, 512), None);
        assert_eq!(rules.step("l2_update"), Some(Errno::NOSPC));
        assert_eq!(rules.step("cluster_free"), None);
        assert_eq!(
            rules.happen("none", IoType::Write, 0, 512),
            Some(Errno::NOSPC),
            "all that is written afterwards"
        );
        assert!(rules.add_config("event = x").is_err());
        assert!(rules.add_config("[inject-error]\nerrno = 5").is_err());
    }
}
