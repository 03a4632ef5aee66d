//! The judges judged: a sound history passes all of them, each planted defect is found by the promise that it breaks, and the
//! linearizability check agrees with trying every order.

use super::linearizable::{self, Verdict};
use super::*;
use crate::history::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

const KEY: &str = "k";

fn op(client: usize, call_s: u64, return_s: u64, request: Request, response: Response) -> Op {
    let (call_ns, return_ns) = (call_s * 1_000_000_000, return_s * 1_000_000_000);
    Op { client, tenant: 0, node: "n1".into(), call_ns, return_ns, request, response }
}

fn add(marker: &str) -> Request {
    Request::Add { id: KEY.into(), marker: marker.into() }
}

fn update(expected: Option<u64>, marker: &str) -> Request {
    Request::Update { id: KEY.into(), expected, marker: marker.into() }
}

fn delete() -> Request {
    Request::Delete { id: KEY.into(), expected: None }
}

fn get(token: Option<u64>) -> Request {
    Request::Get { id: KEY.into(), token }
}

fn written(version: u64, index: u64) -> Response {
    Response::Written {
        version,
        at: At { shard: 0, epoch: 1, index, item: 0 },
        map_version: 1,
        elsewhere: false,
    }
}

fn row(version: u64, marker: &str) -> Row {
    Row { id: KEY.into(), version, tenant: 0, marker: marker.into() }
}

fn value(version: u64, marker: &str, shown: u64) -> Response {
    Response::Value { row: row(version, marker), shown, epoch: 1 }
}

fn last(node: &str, rows: &[Row], versions: &[(u64, &str)]) -> Final {
    let keyed = |row: &Row| ((0, row.id.clone()), row.clone());
    let versions = versions.iter().map(|(version, marker)| (*version, marker.to_string())).collect();
    Final {
        node: node.into(),
        at_ns: 30_000_000_000,
        shards: vec![(
            Sample {
                at_ns: 30_000_000_000,
                node: node.into(),
                shard: 0,
                epoch: 1,
                index: 9,
                digest: vec![9],
            },
            Ok(vec![9]),
        )],
        rows: rows.iter().map(keyed).collect(),
        versions: BTreeMap::from([((0, KEY.to_string()), versions)]),
    }
}

/// Two clients write, read and delete one memory; three replicas end alike.
fn sound() -> History {
    let versions = [(1, "a"), (2, "b"), (3, "deletion of version 2"), (4, "c")];
    let finals = ["n1", "n2", "n3"].map(|node| last(node, &[row(4, "c")], &versions));
    History {
        ends: BTreeMap::new(),
        resubmitted: None,
        ops: vec![
            op(0, 1, 2, add("a"), written(1, 1)),
            op(1, 3, 6, update(None, "b"), written(2, 2)),
            op(0, 4, 5, get(None), value(1, "a", 1)),
            op(0, 7, 8, get(Some(2)), value(2, "b", 2)),
            op(1, 9, 10, update(Some(1), "x"), Response::Refused(Refusal::VersionMismatch { actual: 2 })),
            op(1, 11, 12, delete(), written(3, 3)),
            op(0, 13, 14, get(None), Response::Absent { shown: 3 }),
            op(0, 15, 16, add("c"), written(4, 4)),
            op(1, 17, 18, add("d"), Response::Refused(Refusal::AlreadyExists { version: 4 })),
            op(1, 19, 20, Request::Search { by_vector: true }, Response::Rows(vec![row(4, "c")])),
        ],
        calls: vec![],
        samples: vec![],
        finals: finals.into(),
        healed_ns: 20_000_000_000,
        converged_ns: Some(21_000_000_000),
        converge_limit_ns: 10_000_000_000,
    }
}

/// The promises that a sound history breaks once `plant` has changed it.
fn broken(plant: impl FnOnce(&mut History)) -> Vec<String> {
    let mut history = sound();
    plant(&mut history);
    let mut promises: Vec<String> = check_all(&history).into_iter().map(|v| v.promise).collect();
    promises.dedup();
    promises
}

#[test]
fn a_sound_history_breaks_nothing() {
    assert_eq!(check_all(&sound()), []);
    assert_eq!(lost(&sound()), 0);
}

#[test]
fn a_lost_write_breaks_p1() {
    // The last write is nowhere, though two replicas agree on that.
    let lose = |h: &mut History| {
        for replica in &mut h.finals {
            replica.rows.clear();
            replica.versions.values_mut().for_each(|v| v.truncate(3));
        }
    };
    assert_eq!(broken(lose), ["P1", "P4"]);
    let mut history = sound();
    lose(&mut history);
    assert_eq!(lost(&history), 1);
    // One version is gone from the history of one replica, though a later one is there.
    assert_eq!(broken(|h| h.finals[2].versions.values_mut().for_each(|v| drop(v.remove(1)))), ["P1"]);
}

#[test]
fn a_deleted_memory_that_comes_back_breaks_p1() {
    let resurrect = |h: &mut History| {
        h.ops.truncate(7);
        for replica in &mut h.finals {
            *replica = last(&replica.node, &[row(2, "b")], &[(1, "a"), (2, "b"), (3, "deletion")]);
        }
    };
    assert_eq!(broken(resurrect), ["P1", "P4"]);
}

#[test]
fn two_acknowledgements_of_one_place_break_p3() {
    assert_eq!(broken(|h| h.ops[7].response = written(4, 3)), ["P3"]);
}

#[test]
fn a_stale_strong_read_breaks_p4() {
    assert_eq!(broken(|h| h.ops[6].response = value(2, "b", 2)), ["P4"]);
    // As does one of a write that no one ever made.
    assert_eq!(broken(|h| h.ops[2].response = value(1, "z", 1)), ["P4"]);
}

#[test]
fn a_session_that_goes_back_breaks_p4() {
    assert_eq!(broken(|h| h.ops[3].response = value(2, "b", 1)), ["P4"], "shown less than its token");
    let twice = |h: &mut History| h.ops.push(op(0, 21, 22, get(Some(1)), value(2, "b", 4)));
    assert_eq!(broken(twice), ["P4"], "an older version than it had seen");
}

#[test]
fn an_edge_to_nowhere_or_to_what_was_deleted_breaks_p6() {
    let walk = |at, rows: Vec<Row>, edges| op(0, at, at + 1, Request::Walk, Response::Walked { rows, edges });
    let here = || row(4, "c").id;
    let link = |at, answer| op(0, at, at + 1, Request::Link { from: here(), to: here() }, answer);
    let shown =
        |linked: Op| broken(|h| h.ops.extend([linked, walk(21, vec![row(4, "c")], vec![(here(), here())])]));
    assert_eq!(shown(link(16, Response::Linked)), Vec::<String>::new());
    // The memory was deleted from 11 to 12, and the edge with it; unless it was set who knows when.
    assert_eq!(shown(link(5, Response::Linked)), ["P6"]);
    assert_eq!(shown(link(5, Response::Unknown)), Vec::<String>::new());
    assert_eq!(broken(|h| h.ops.push(walk(21, vec![row(4, "c")], vec![(here(), "x".into())]))), ["P6"]);
    assert_eq!(broken(|h| h.ops.push(walk(21, vec![row(2, "b")], vec![]))), ["P6"]);
    let search = |by_vector, row| op(0, 21, 22, Request::Search { by_vector }, Response::Rows(vec![row]));
    assert_eq!(broken(|h| h.ops.push(search(true, row(2, "b")))), ["P6"], "an old version");
    assert_eq!(
        broken(|h| h.ops.push(search(false, row(2, "b")))),
        Vec::<String>::new(),
        "but not a strong one"
    );
}

/// The region is lost after entry 4, of which the other one, which goes on in epoch 2, has 3: another memory takes the place of the last one.
fn after_a_failover(h: &mut History) {
    let versions = [(1, "a"), (2, "b"), (3, "deletion of version 2"), (4, "e")];
    h.finals = ["n1", "n2", "n3"].map(|node| last(node, &[row(4, "e")], &versions)).into();
    let at = At { shard: 0, epoch: 2, index: 5, item: 0 };
    let again = Response::Written { version: 4, at, map_version: 2, elsewhere: false };
    h.ops.push(op(1, 25, 26, add("e"), again));
    h.ends.insert((0, 1), End { certain: 3, ceiling: 9, exact: None });
}

#[test]
fn a_loss_that_was_not_reported_breaks_p2() {
    let plant = |plant: fn(&mut History)| {
        broken(|h| {
            after_a_failover(h);
            plant(h);
        })
    };
    assert_eq!(plant(|_| ()), Vec::<String>::new());
    let mut history = sound();
    after_a_failover(&mut history);
    assert_eq!((lost(&history), reported(&history).len()), (0, 1));
    assert_eq!(plant(|h| h.ends.values_mut().for_each(|end| end.certain = 4)), ["P2"]);
    assert_eq!(plant(|h| h.ends.values_mut().for_each(|end| end.ceiling = 3)), ["P2"]);
    let elsewhere = |h: &mut History| {
        if let Response::Written { elsewhere, .. } = &mut h.ops[7].response {
            *elsewhere = true;
        }
    };
    assert_eq!(plant(elsewhere), ["P2"]);
    // What an old disk says is exact: no more, and no less.
    for (exact, breaks) in [((3, 4), false), ((4, 4), true), ((4, 6), true), ((1, 4), true)] {
        let found = broken(|h| {
            after_a_failover(h);
            h.ends.values_mut().for_each(|end| end.exact = Some(exact));
        });
        assert_eq!(found, if breaks { vec!["P2"] } else { vec![] }, "{exact:?}");
    }
    // Nor may the old region go on, or a session be shown what is gone.
    let late = |h: &mut History| h.ops.push(op(0, 27, 28, delete(), written(5, 5)));
    assert!(plant(late).contains(&"P3".to_string()));
    let back = |h: &mut History| h.ops.push(op(1, 29, 30, get(None), value(3, "b", 5)));
    assert!(plant(back).contains(&"P4".to_string()));
    let told = |h: &mut History| {
        h.ops.push(op(0, 27, 28, get(Some(4)), Response::Lost));
        h.ops.push(op(0, 29, 30, get(None), value(4, "e", 5)));
    };
    assert_eq!(plant(told), Vec::<String>::new());
    // The next epoch's first answer names none, and a write of the first one that is tried again is answered after it.
    let again = |h: &mut History| {
        h.ops[5].return_ns = op(0, 1, 24, get(None), Response::Unknown).return_ns;
        h.ops.push(op(0, 21, 22, update(None, "x"), Response::Refused(Refusal::NotFound)));
    };
    assert_eq!(plant(again), Vec::<String>::new());
}

#[test]
fn what_is_written_again_must_be_there_and_nothing_else() {
    let after = |memories: Option<&[bool]>, there: bool| {
        broken(|h| {
            let finals = h.finals.clone();
            after_a_failover(h);
            if there {
                // Nobody wrote meanwhile.
                h.finals = finals;
                h.ops.pop();
            }
            h.ends.values_mut().for_each(|end| end.exact = Some((3, 4)));
            h.resubmitted =
                memories.map(|of| of.iter().map(|again| ((0, KEY.to_string()), *again)).collect());
        })
    };
    let nothing = Vec::<String>::new();
    assert_eq!(after(Some(&[false]), false), nothing, "somebody had written since");
    assert_eq!(after(Some(&[true]), false), ["P2"], "said to be written again");
    assert_eq!(after(Some(&[]), false), ["P2"], "not in any quarantine");
    assert_eq!(after(Some(&[true]), true), nothing);
    assert_eq!(after(None, true), ["P2"], "nobody wrote it again");
}

#[test]
fn replicas_that_differ_break_p5() {
    assert_eq!(broken(|h| h.finals[1].shards[0].0.digest = vec![8]), ["P5"]);
    assert_eq!(broken(|h| h.finals[1].shards[0].1 = Ok(vec![8])), ["P5"]);
    assert_eq!(broken(|h| h.finals[1].shards[0].1 = Err("unreadable".into())), ["P5"]);
    let early = |digest: u8| Sample {
        at_ns: 5,
        node: "n2".into(),
        shard: 0,
        epoch: 1,
        index: 4,
        digest: vec![digest],
    };
    assert_eq!(broken(|h| h.samples = vec![early(1), early(2)]), ["P5"], "long before the end");
}

#[test]
fn another_tenants_row_breaks_p7() {
    let foreign = Row { id: "f".into(), tenant: 1, ..row(4, "c") };
    assert_eq!(broken(|h| h.ops[9].response = Response::Rows(vec![row(4, "c"), foreign])), ["P7"]);
    assert_eq!(
        broken(|h| h.ops[2].response =
            Response::Value { row: Row { tenant: 1, ..row(1, "a") }, shown: 1, epoch: 1 }),
        ["P7"]
    );
}

#[test]
fn a_search_that_leaves_out_what_is_there_or_shows_it_twice_breaks_p8() {
    let found = |rows: &[Row]| Response::Rows(rows.to_vec());
    assert_eq!(broken(|h| h.ops[9].response = found(&[])), ["P8"]);
    assert_eq!(broken(|h| h.ops[9].response = found(&[row(4, "c"), row(4, "c")])), ["P8"]);
    let list = |rows: &[Row]| op(0, 21, 22, Request::List, found(rows));
    assert_eq!(broken(|h| h.ops.push(list(&[row(4, "c"), row(4, "c")]))), ["P8"]);
    // By words it may be older; what is being deleted, or perhaps was, need not be there.
    let search = |by_vector, at| op(0, at, at + 1, Request::Search { by_vector }, found(&[]));
    assert_eq!(broken(|h| h.ops.push(search(false, 21))), Vec::<String>::new());
    assert_eq!(broken(|h| h.ops.push(search(true, 3))), ["P8"], "before it was deleted");
    assert_eq!(broken(|h| h.ops.push(search(true, 11))), Vec::<String>::new(), "while it was deleted");
    assert_eq!(broken(|h| h.ops.push(search(true, 13))), Vec::<String>::new(), "when it was deleted");
    let doubtful = |h: &mut History| {
        h.ops[5].response = Response::Unknown;
        h.ops.push(search(true, 13));
    };
    assert!(!broken(doubtful).contains(&"P8".to_string()), "it may have been deleted");
}

#[test]
fn a_write_applied_twice_breaks_p10() {
    let twice = |h: &mut History| {
        for replica in &mut h.finals {
            replica.versions.values_mut().for_each(|v| v.push((5, "c".into())));
        }
    };
    assert_eq!(broken(twice), ["P10"]);
    let changed = |first_s: u64| Response::Changed {
        first: "refused".into(),
        first_ns: first_s * 1_000_000_000,
        then: "version 5".into(),
        at: None,
    };
    assert!(broken(|h| h.ops[7].response = changed(16)).contains(&"P10".to_string()));
    // `far-apart`, seed 4: what the key was refused with is lost with its region.
    let refused = |call, first, last| {
        broken(|h| {
            after_a_failover(h);
            h.ops.push(op(1, call, last, delete(), changed(first)));
        })
    };
    assert_eq!(refused(13, 14, 30), Vec::<String>::new());
    assert_eq!(refused(7, 8, 30), ["P10"], "entry 3, which is certain, was asked for after it");
    assert_eq!(refused(27, 28, 30), ["P10"], "it is of the epoch that goes on");
}

#[test]
fn late_or_no_agreement_breaks_p12() {
    assert_eq!(broken(|h| h.converged_ns = Some(31_000_000_000)), ["P12"]);
    assert_eq!(broken(|h| h.converged_ns = None), ["P12"]);
}

#[test]
fn a_write_of_unknown_outcome_may_have_happened_late_or_never() {
    let unknown = op(0, 1, 2, add("a"), Response::Unknown);
    let seen = op(1, 8, 9, get(None), value(1, "a", 1));
    let unseen = op(1, 5, 6, get(None), Response::Absent { shown: 0 });
    assert_eq!(linearizable::check(&[&unknown, &unseen, &seen]), Verdict::Linearizable);
    assert_eq!(linearizable::check(&[&unknown, &unseen]), Verdict::Linearizable);
    let gone = op(1, 11, 12, get(None), Response::Absent { shown: 0 });
    assert!(matches!(linearizable::check(&[&unknown, &seen, &gone]), Verdict::Impossible { .. }));
}

/// The model once more, told differently: by the versions it has been through.
#[derive(Clone, Default)]
struct Model {
    version: u64,
    marker: Option<String>,
}

impl Model {
    fn answer(&mut self, request: &Request) -> Response {
        let here = self.marker.is_some();
        let wrong = |expected: &Option<u64>| expected.is_some_and(|e| e != self.version);
        let refused = match request {
            Request::Add { .. } if here => Some(Refusal::AlreadyExists { version: self.version }),
            Request::Update { .. } | Request::Delete { .. } if !here => Some(Refusal::NotFound),
            Request::Update { expected, .. } | Request::Delete { expected, .. } if wrong(expected) => {
                Some(Refusal::VersionMismatch { actual: self.version })
            }
            _ => None,
        };
        if let Some(refusal) = refused {
            return Response::Refused(refusal);
        }
        self.marker = match request {
            Request::Get { .. } => {
                let row = self.marker.as_ref().map(|marker| row(self.version, marker));
                return row.map_or(Response::Absent { shown: 0 }, |row| Response::Value {
                    row,
                    shown: 0,
                    epoch: 1,
                });
            }
            Request::Add { marker, .. } | Request::Update { marker, .. } => Some(marker.clone()),
            _ => None,
        };
        self.version += 1;
        written(self.version, self.version)
    }
}

/// Whether some order of the operations, with any of the unknown ones left out, fits their answers and times.
fn some_order_fits(model: &Model, ops: &[&Op]) -> bool {
    let open = |op: &&Op| op.response != Response::Unknown;
    if !ops.iter().any(open) {
        return true;
    }
    (0..ops.len()).any(|i| {
        let rest: Vec<&Op> = ops.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, op)| *op).collect();
        let may_be_next = rest.iter().filter(|op| open(op)).all(|op| op.return_ns >= ops[i].call_ns);
        let mut next = model.clone();
        let answer = next.answer(&ops[i].request);
        let placed = |a: &Response| match a {
            Response::Written { version, .. } => written(*version, 0),
            other => other.clone(),
        };
        let fits = ops[i].response == Response::Unknown || placed(&answer) == placed(&ops[i].response);
        may_be_next && fits && some_order_fits(&next, &rest)
    })
}

fn requests() -> impl Strategy<Value = Request> {
    let expected = prop::option::weighted(0.3, 1..4u64);
    (0..5, expected, "[a-c]").prop_map(|(kind, expected, marker)| match kind {
        0 => add(&marker),
        1 => update(expected, &marker),
        2 => Request::Delete { id: KEY.into(), expected },
        _ => get(None),
    })
}

/// Operations with a moment at which each took place, between its call and its answer; some answers are then lost or exchanged.
fn histories(most: usize) -> impl Strategy<Value = (Vec<Op>, bool)> {
    let one = (requests(), 0..40u64, 0..6u64, 0..6u64, prop::bool::weighted(0.15));
    (prop::collection::vec(one, 1..most), prop::option::of((0..100usize, 0..100usize))).prop_map(
        |(mut parts, exchange)| {
            parts.sort_by_key(|(_, moment, ..)| *moment);
            let mut model = Model::default();
            let mut ops: Vec<Op> = parts
                .into_iter()
                .map(|(request, moment, before, after, lost)| {
                    let answer = model.answer(&request);
                    let lost = lost && request.is_write();
                    let response = if lost { Response::Unknown } else { answer };
                    op(0, 10 + moment - before, 10 + moment + after, request, response)
                })
                .collect();
            let count = ops.len();
            if let Some((a, b)) = exchange.map(|(a, b)| (a % count, b % count)) {
                let response = ops[a].response.clone();
                ops[a].response = std::mem::replace(&mut ops[b].response, response);
            }
            (ops, exchange.is_none())
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_check_agrees_with_trying_every_order((ops, _) in histories(7)) {
        let ops: Vec<&Op> = ops.iter().collect();
        let fits = some_order_fits(&Model::default(), &ops);
        prop_assert_eq!(linearizable::check(&ops) == Verdict::Linearizable, fits, "{:#?}", ops);
    }
}

proptest! {
    #[test]
    fn what_did_happen_one_at_a_time_is_linearizable((ops, whole) in histories(60)) {
        let ops: Vec<&Op> = ops.iter().collect();
        if whole {
            prop_assert_eq!(linearizable::check(&ops), Verdict::Linearizable);
        }
    }
}

/// A person's memory is written, erased, and written again.
fn forgotten(plant: impl FnOnce(&mut History)) -> Vec<String> {
    const PERSONS: &str = "0-3";
    let mut history = sound();
    let row = |version, marker: &str| Row { id: PERSONS.into(), ..row(version, marker) };
    let add = |marker: &str| Request::Add { id: PERSONS.into(), marker: marker.into() };
    history.ops.extend([
        op(2, 1, 2, add("p"), written(1, 11)),
        op(2, 3, 4, Request::Erase, Response::Erased { elsewhere: false }),
        op(2, 5, 6, add("q"), written(3, 13)),
        op(2, 7, 8, Request::Search { by_vector: true }, Response::Rows(vec![row(3, "q"), row_of_k(2, "b")])),
    ]);
    // The search that there was finds it as well.
    history.ops[9].response = Response::Rows(vec![row_of_k(4, "c"), row(3, "q")]);
    let versions = [(2, "erasure of version 1".to_string()), (3, "q".to_string())];
    for replica in &mut history.finals {
        replica.rows.insert((0, PERSONS.into()), row(3, "q"));
        replica.versions.insert((0, PERSONS.into()), versions.to_vec());
    }
    plant(&mut history);
    let mut promises: Vec<String> = check_all(&history).into_iter().map(|v| v.promise).collect();
    promises.dedup();
    promises
}

fn row_of_k(version: u64, marker: &str) -> Row {
    row(version, marker)
}

#[test]
fn what_comes_back_of_an_erased_person_is_found_wherever_it_is_shown() {
    let id = || "0-3".to_string();
    let old = || Row { id: id(), ..row(1, "p") };
    let reads = |request: Request, response: Response| {
        move |history: &mut History| history.ops.push(op(0, 5, 6, request, response))
    };
    assert_eq!(forgotten(|_| {}), [""; 0]);
    let get = |token| Request::Get { id: id(), token };
    let shown = |shown| Response::Value { row: old(), shown, epoch: 1 };
    assert_eq!(forgotten(reads(get(None), shown(14))), ["P4", "P6"]);
    assert_eq!(forgotten(reads(get(Some(1)), shown(14))), [""; 0], "another session may be behind");
    assert_eq!(forgotten(reads(Request::List, Response::Rows(vec![old()]))), ["P6"]);
    let walked = Response::Walked { rows: vec![old()], edges: vec![] };
    assert_eq!(forgotten(reads(Request::Walk, walked)), ["P6"]);
    let of_history = |h: &mut History| {
        let versions = h.finals[1].versions.entry((0, id())).or_default();
        versions.insert(0, (1, "p".into()));
    };
    assert_eq!(forgotten(of_history), ["P6"], "a history has it");
    // What was written after the erasure began may have come after it.
    let later = |h: &mut History| {
        h.ops[11].call_ns = 0;
        of_history(h);
    };
    assert_eq!(forgotten(later), [""; 0]);
    // The next life is missed, if it is lost.
    let lost = |h: &mut History| {
        for replica in &mut h.finals {
            replica.rows.remove(&(0, id()));
        }
    };
    assert!(forgotten(lost).contains(&"P1".to_string()));
}

/// `saturated-link`, seed 2: an update was lost with its region, a search showed what it would have replaced, and the person was erased later.
#[test]
fn what_was_lost_and_then_erased_need_not_be_shown_in_between() {
    let id = || "0-3".to_string();
    // The others see a history without a second epoch, which does not matter here.
    let breaks_p6 = |end: Option<End>| {
        let broken = forgotten(|h| {
            let update = Request::Update { id: id(), expected: None, marker: "p2".into() };
            let search = Request::Search { by_vector: true };
            h.ops.push(op(0, 2, 3, update, written(2, 12)));
            h.ops.push(op(1, 4, 5, search, Response::Rows(vec![Row { id: id(), ..row(1, "p") }])));
            h.ends.extend(end.map(|end| ((0, 1), end)));
        });
        broken.contains(&"P6".to_string())
    };
    assert!(breaks_p6(None));
    assert!(breaks_p6(Some(End { certain: 12, ceiling: 12, exact: None })));
    assert!(!breaks_p6(Some(End { certain: 11, ceiling: 12, exact: None })));
}

/// `stands-still`, seed 9: a write was under way when the third epoch ended; it had been seen, was lost, and was written again.
#[test]
fn what_was_under_way_when_a_later_epoch_ended_may_be_seen_lost_and_written_again() {
    let of_epoch = |epoch: u64, version: u64, index: u64| Response::Written {
        version,
        at: At { shard: 0, epoch, index, item: 0 },
        map_version: epoch,
        elsewhere: false,
    };
    let breaks_p4 = |answered_s: u64, by_epoch: u64| {
        let found = broken(|h| {
            for epoch in [1, 2] {
                h.ends.insert((0, epoch), End { certain: 5, ceiling: 9, exact: None });
            }
            let shown =
                |epoch, version, marker: &str| Response::Value { row: row(version, marker), shown: 6, epoch };
            h.ops.push(op(1, 20, 21, get(None), shown(1, 4, "c")));
            h.ops.push(op(1, 22, 23, update(None, "e"), of_epoch(2, 5, 5)));
            h.ops.push(op(2, 24, answered_s, update(None, "f"), of_epoch(by_epoch, 6, 6)));
            h.ops.push(op(0, 26, 27, get(None), shown(2, 6, "f")));
            h.ops.push(op(1, 28, 29, get(None), shown(3, 5, "e")));
            let versions = [(1, "a"), (2, "b"), (3, "deletion of version 2"), (4, "c"), (5, "e"), (6, "f")];
            h.finals = ["n1", "n2", "n3"].map(|node| last(node, &[row(6, "f")], &versions)).into();
        });
        found.contains(&"P4".to_string())
    };
    assert!(breaks_p4(25, 2), "it was answered before, and is there: it was not lost");
    assert!(!breaks_p4(30, 3));
}

/// `stands-still`, seed 7: a replica never came back, so nobody looked at what is there in the end.
#[test]
fn where_the_end_is_not_known_what_may_be_lost_is_not_missed() {
    let found = |certain: u64| {
        broken(|h| {
            h.ends.insert((0, 1), End { certain, ceiling: 9, exact: None });
            h.ops.push(op(1, 21, 22, update(None, "x"), written(5, 5)));
            let search = Request::Search { by_vector: true };
            h.ops.push(op(0, 23, 24, search, Response::Rows(vec![row(4, "c")])));
            let shown = Response::Value { row: row(4, "c"), shown: 6, epoch: 2 };
            h.ops.push(op(2, 25, 26, get(None), shown));
            h.finals.clear();
            h.converged_ns = None;
        })
    };
    assert_eq!(found(4), ["P12"]);
    assert_eq!(found(5), ["P6", "P12"], "entry 5 is not lost");
}

/// `a-second-failure`, seed 2: a write began after the last answer that named the first epoch, a refusal told of it, it was lost, and was written again.
#[test]
fn a_refusal_may_tell_of_what_was_lost_and_written_again() {
    let breaks_p4 = |called_s: u64| {
        let found = broken(|h| {
            h.ends.insert((0, 1), End { certain: 5, ceiling: 9, exact: None });
            let shown =
                |epoch, version, marker: &str| Response::Value { row: row(version, marker), shown: 6, epoch };
            h.ops.push(op(1, 20, 21, get(None), shown(1, 4, "c")));
            let at = At { shard: 0, epoch: 2, index: 5, item: 0 };
            let written = Response::Written { version: 5, at, map_version: 2, elsewhere: false };
            h.ops.push(op(2, called_s, 32, update(None, "f"), written));
            let exists = Response::Refused(Refusal::AlreadyExists { version: 5 });
            h.ops.push(op(0, 23, 24, add("g"), exists));
            h.ops.push(op(1, 28, 29, get(None), shown(2, 4, "c")));
            let versions = [(1, "a"), (2, "b"), (3, "deletion of version 2"), (4, "c"), (5, "f")];
            h.finals = ["n1", "n2", "n3"].map(|node| last(node, &[row(5, "f")], &versions)).into();
        });
        found.contains(&"P4".to_string())
    };
    assert!(!breaks_p4(22));
    assert!(breaks_p4(30), "no write was under way: nothing can have been at version 5");
}
