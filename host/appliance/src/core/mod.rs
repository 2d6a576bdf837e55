//! What the appliance gives the parts that start nothing by themselves: clocks, threads, jobs, durable records.

pub mod clock;
pub mod jobs;
pub mod reactor;
pub mod records;
pub mod seat;
pub mod status;
pub mod ticker;
