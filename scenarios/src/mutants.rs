//! The planted bugs: realistic mistakes in the real code, each behind its name ([`sim::planted!`]), that measure how good the net is.

/// One planted bug.
pub struct Mutant {
    pub name: &'static str,
    /// What goes wrong, and when.
    pub what: &'static str,
}

const fn mutant(name: &'static str, what: &'static str) -> Mutant {
    Mutant { name, what }
}

/// All of them.
pub const MUTANTS: [Mutant; 55] = [
    mutant("acknowledge-before-fsync", "the log says that entries are durable before their fsync"),
    mutant("forget-the-directory-sync", "a new log segment's name is not made durable"),
    mutant("keep-the-vote-in-memory", "a restarted replica does not know for whom it voted"),
    mutant("truncate-one-entry-less", "a follower keeps one entry that its new leader does not have"),
    mutant("purge-before-the-checkpoint", "the log is purged while the views are not yet durable"),
    mutant("serve-from-a-deposed-leader", "a strong read asks no majority whether its leader still leads"),
    mutant(
        "wait-for-one-position-less",
        "a read is answered one entry before the position that it waits for",
    ),
    mutant("read-before-the-position-is-published", "a strong read does not wait for the views"),
    mutant(
        "name-only-what-an-answer-shows-at-least",
        "a session's token leaves out what was applied while its answer was read",
    ),
    mutant(
        "vote-with-a-damaged-log",
        "a replica that lost acknowledged entries votes before it has them back",
    ),
    mutant("catch-up-from-one-entry-later", "views made anew leave out the first entry of the log"),
    mutant("trust-the-logs-entries", "the checksums of the log's entries are not looked at"),
    mutant("forget-idempotency-keys", "a retried write is applied again"),
    mutant(
        "repeat-an-uncertain-write-without-its-key",
        "an edge repeats a write whose outcome it does not know",
    ),
    mutant("apply-entries-again", "entries that the views already have are applied again"),
    mutant("ignore-the-expected-version", "an update or deletion of an old version succeeds"),
    mutant("forget-a-deletions-version", "a memory that is added again begins at version 1"),
    mutant("store-the-replicas-own-time", "apply looks at the replica's clock"),
    mutant("leave-inbound-edges-behind", "a deleted memory's inbound edges stay"),
    mutant(
        "leave-the-history-of-an-erased-memory",
        "an erasure removes memories, and not what they were before",
    ),
    mutant(
        "trust-an-erasure-of-an-epoch-that-is-over",
        "an erasure that may be lost with its region is not made again",
    ),
    mutant("keep-an-old-version-in-the-cache", "the cache is not told of updates"),
    mutant("search-the-words-of-all-tenants", "a search by words leaves the tenant's filter out"),
    mutant("lose-a-tombstone-of-a-segment", "a vector in a segment survives its memory"),
    mutant("name-a-segment-that-is-not-synced", "a segment of vectors is named before its bytes are durable"),
    mutant("take-writes-of-a-sealed-slot", "a shard takes writes for slots that are being copied to another"),
    mutant("answer-for-a-slot-that-is-elsewhere", "a replica answers for slots that it does not show"),
    mutant("vote-with-an-empty-disk", "a replica whose disk was lost votes before it has been filled again"),
    mutant(
        "take-an-old-group-for-new",
        "a replica of the control group whose disk was lost, and whom nobody told so, votes as if its group were new",
    ),
    mutant(
        "vote-before-it-has-been-filled",
        "a replica that comes back to a group, empty, votes for one that has not heard of its leaving",
    ),
    mutant(
        "follow-any-leader-after-forgetting",
        "a replica whose disk was lost takes entries from a leader that was deposed before that",
    ),
    mutant("leave-the-keys-behind-in-a-move", "slots move to another shard without their idempotency keys"),
    mutant(
        "show-what-has-not-been-adopted",
        "a shard answers from slots that it has not adopted, or has released",
    ),
    mutant(
        "move-a-pinned-tenants-memories-with-their-slots",
        "a move of everybody's slots takes along what a tenant that is pinned has in them",
    ),
    mutant("give-the-token-of-the-entry-before", "a write's token names the position before it"),
    mutant("answer-without-the-view", "a replica answers what only others have a view for"),
    mutant("show-a-memory-twice", "a memory that was found by its vector and by its words is shown as two"),
    mutant("trust-a-learner-to-be-fresh", "a strong read of a replica that does not vote asks nobody"),
    mutant("leave-the-vectors-out-of-a-snapshot", "a replica that is sent a snapshot keeps no vectors of it"),
    mutant("keep-in-a-cache-what-was-changed", "a cache node hears of changes and keeps what it has"),
    mutant(
        "keep-in-a-cache-what-changed-meanwhile",
        "a cache node keeps what it read although it changed while it was read",
    ),
    mutant("leave-the-words-out-of-a-snapshot", "a replica that is sent a snapshot indexes no words of it"),
    mutant("append-under-another-epochs-lease", "a right to write is taken for that of any epoch"),
    mutant(
        "acknowledge-after-the-lease-ran-out",
        "a leader does not look again at its region's right before it acknowledges",
    ),
    mutant(
        "grant-without-waiting-for-the-lease",
        "the next epoch is granted while the old region may still hold its right",
    ),
    mutant("validate-with-one-observer", "a region is given up because one node does not reach it"),
    mutant("fail-back-without-waiting-for-the-tail", "a planned change does not wait for what is on its way"),
    mutant(
        "promote-the-first-that-halts",
        "an epoch begins with what one replica has, whatever the others have",
    ),
    mutant(
        "re-submit-over-what-was-written-since",
        "what was lost with a region is written again over what others wrote meanwhile",
    ),
    mutant("promote-the-one-with-least", "an epoch begins with the replica that has least"),
    mutant(
        "take-messages-of-an-old-epoch",
        "a replica that has gone over to an epoch still takes entries of the old one",
    ),
    mutant(
        "call-region-durable-what-is-only-on-its-way",
        "a write is called durable in the other region before that has it",
    ),
    mutant(
        "believe-tokens-of-an-epoch-that-is-over",
        "a token for what was lost is answered as if it were there",
    ),
    mutant("forget-what-was-purged", "an old disk gives up what it has purged, though the next epoch has it"),
    mutant(
        "wait-for-a-chosen-replica-that-has-forgotten",
        "nobody begins an epoch in place of a replica that lost its disk before it did",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::Path;

    fn names_in(dir: &Path, call: &str, found: &mut BTreeSet<String>) -> std::io::Result<()> {
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                names_in(&path, call, found)?;
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path)?;
                found.extend(
                    text.split(call).skip(1).filter_map(|rest| rest.split('"').next()).map(String::from),
                );
            }
        }
        Ok(())
    }

    fn names_in_the_code(call: &str) -> std::io::Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for package in ["storage", "nodes"] {
            names_in(
                &Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(package).join("src"),
                call,
                &mut found,
            )?;
        }
        Ok(found)
    }

    #[test]
    fn the_catalogue_has_the_bugs_that_the_code_has() -> std::io::Result<()> {
        let catalogue: BTreeSet<String> = MUTANTS.iter().map(|m| m.name.to_string()).collect();
        assert_eq!(catalogue.len(), MUTANTS.len(), "a name stands there twice");
        assert_eq!(names_in_the_code("planted!(\"")?, catalogue);
        Ok(())
    }

    #[test]
    fn the_list_of_buggify_sites_is_that_of_the_code() -> std::io::Result<()> {
        let mut sites = names_in_the_code("buggify_wait(\"")?;
        sites.extend(names_in_the_code("buggify(\"")?);
        let known = crate::settle::SITES.iter().chain(&crate::settle::REGION_SITES);
        assert_eq!(sites, known.map(|s| s.to_string()).collect());
        Ok(())
    }
}
